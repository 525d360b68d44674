"""A page to try models in a browser, and its HTTP API, in Gradio."""
