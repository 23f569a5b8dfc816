"""The ReLU feed-forward network of an ordinary layer."""
