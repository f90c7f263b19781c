"""Clients of a server under attack: how they ask, what they ask for, and what they should get.

wire.py     one request over a socket, by a client that may be slow or go away
asking.py   requests that are to be served
broken.py   requests that are to be refused
reading.py  what came back
alone.py    the texts that the same requests get alone
crowd.py    many of them at once, some of which go away
process.py  the server as a process, and what it holds
figures.py  what the report says of it
"""
