"""What only developers run; nothing here is installed.

demo/ trains the demo checkpoint, bench/ measures the project's own choices, peers/ compares it with other
programs, and harness/ tries to break it.
"""
