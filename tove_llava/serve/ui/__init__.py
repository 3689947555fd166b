"""The demo's page; :mod:`tove_llava.serve.gradio_app` puts its parts together."""
