"""What a sweep has learned: trials → ranking → sweep.parquet and the page; pure, without Ray and without torch."""
