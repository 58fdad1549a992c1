"""Parameter-free fine-tuning: overwrite redundant channels of a frozen encoder by better ones."""

from vfmk.channels.apply import apply, remove
from vfmk.channels.channel_map import ChannelMap
from vfmk.channels.samples import load_samples
from vfmk.channels.search import SearchResult, search

__all__ = ["ChannelMap", "SearchResult", "apply", "load_samples", "remove", "search"]
