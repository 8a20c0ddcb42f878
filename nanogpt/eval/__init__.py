"""Judging a checkpoint: loss on a text, HellaSwag, LAMBADA, and the door to lm-eval. Runs on any runner."""
