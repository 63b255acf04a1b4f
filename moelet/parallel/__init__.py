"""One run on many ranks: who is there, what they add up, which part of the model lies where."""
