"""One file per sequence mixer: the part of a layer that moves information along the sequence."""
