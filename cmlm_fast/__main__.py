"""`python -m cmlm_fast`, for launchers: `torchrun --nproc-per-node 8 -m cmlm_fast post-train ...`."""

from .cli import main

if __name__ == "__main__":
    main()
