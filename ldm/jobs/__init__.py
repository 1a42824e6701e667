"""What may be asked for: pictures of prompts and labels, under settings. No torch: a mistake is told at once."""

from ldm.jobs.beginning import Beginning
from ldm.jobs.plan import Plan
from ldm.jobs.prompts import read_prompts
from ldm.jobs.request import Ask, Request, batches, expand, of_prompts
from ldm.jobs.settings import Settings

__all__ = ["Ask", "Beginning", "Plan", "Request", "Settings", "batches", "expand", "of_prompts", "read_prompts"]
