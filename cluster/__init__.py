"""Process mesh and Ray evaluation jobs."""
