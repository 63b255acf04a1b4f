"""`moelet serve`: runs behind a web page and OpenAI's completions."""
