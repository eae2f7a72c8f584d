"""The demo behind ``lucid demo``: a memory task and a language model on a real novel.

``runner.run_demo`` is the way in; ``configuration`` holds every size. Needs the extra ``demo``.
"""
