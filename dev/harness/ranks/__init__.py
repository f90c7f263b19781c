"""Ranks as processes of their own: how they are started, how one of them is lost, and how the others end."""
