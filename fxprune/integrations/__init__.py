"""Other libraries' models and training loops: each module here needs its library, and nothing else imports it."""
