"""``python -m lucid_attention`` is the ``lucid`` command: what `accelerate launch -m` can start."""

from lucid_attention.cli import main

if __name__ == "__main__":
    main()
