"""Where shards lie: local folders, http(s) and object stores, and the cache on disk between them and the readers."""
