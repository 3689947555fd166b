"""The web: the page in the browser, the OpenAI endpoint, and the commands of the terminal chat."""
