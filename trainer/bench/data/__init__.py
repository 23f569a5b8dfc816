"""`longspan bench data`: tokens a second of the readers, seeking in the lane plan, BPE encoding, beside their peers."""
