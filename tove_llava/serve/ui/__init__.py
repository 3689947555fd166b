"""The parts of the demo's page, one idea a file. :mod:`tove_llava.serve.gradio_app` puts them together."""
