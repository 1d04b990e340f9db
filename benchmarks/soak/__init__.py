"""Does a server survive? Thousands of requests of all kinds, good ones and malicious ones."""
