"""One module per format, each with `TASKS`, `splits` and `read`; `reading.py` is the door to them."""
