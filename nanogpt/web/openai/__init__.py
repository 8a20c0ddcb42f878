"""OpenAI's API over the same engine: its routes, its fields, its form of answers and of errors."""
