"""``make bench-cpu``: this product's CPU runner beside other engines, in one run on one machine. See README.md."""
