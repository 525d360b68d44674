"""A page to try models in a browser, and the HTTP API of the same process; needs Gradio."""
