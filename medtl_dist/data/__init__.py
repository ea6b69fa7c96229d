"""images → manifest → shards and index → batches."""
