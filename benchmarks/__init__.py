"""Speed of cmlm_fast beside what users would run instead; `make bench` from the repository's root."""
