"""Contexts that are compressed once and asked by many: snapshots of prefixes, and the server of ``coldpress serve``.

``snapshots.py`` is a library of its own, and needs nothing beside torch and transformers. What listens is in ``app.py``
and ``listening.py``, which alone need the packages of ``coldpress[serve]``.
"""
