"""RMS normalisation with the residual sum and the dropout around it."""
