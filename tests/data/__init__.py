"""Claims about `manyhands.data`."""
