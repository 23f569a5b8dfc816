"""One sequence over several ranks: halo exchange, ring attention, hand-over of block states, scan of affine states."""
