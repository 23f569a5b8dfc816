"""Negative log-likelihood of each token from hidden vectors and a tied embedding."""
