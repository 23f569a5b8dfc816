"""Sources of documents: readers that turn a package or a folder into whole documents, in a fixed order."""
