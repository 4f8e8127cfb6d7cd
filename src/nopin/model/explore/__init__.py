"""The explorer: every order of events of a scenario up to a bound, or many drawn ones, and what they break."""
