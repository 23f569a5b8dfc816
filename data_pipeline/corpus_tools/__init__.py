"""Looking into finished corpora, and making new ones of them without reading a source again."""
