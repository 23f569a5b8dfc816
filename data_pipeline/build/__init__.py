"""Building a corpus: sources -> documents on disk -> groups and splits -> tokenizer -> shards and manifest."""

from longspan.data_pipeline.build.corpus import BuildResult, build_corpus

__all__ = ["BuildResult", "build_corpus"]
