"""Ways to run elsewhere: each file holds the executor of its name."""
