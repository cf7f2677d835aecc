"""What a report says in words, sentence by sentence, and what it must not say."""

from __future__ import annotations


