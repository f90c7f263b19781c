"""The parts by name: each is one way to break things."""

from dev.harness.part import Part
from dev.harness.parts.configs import open_configs
from dev.harness.parts.faults import open_allocation, open_io, open_threads
from dev.harness.parts.gguf import open_gguf
from dev.harness.parts.headers import open_headers
from dev.harness.parts.index import open_index
from dev.harness.parts.interrupts import open_interrupts
from dev.harness.parts.journal import open_journal
from dev.harness.parts.kills import open_kills
from dev.harness.parts.options import open_options
from dev.harness.parts.ranks import open_ranks
from dev.harness.parts.server import open_server
from dev.harness.parts.sessions import open_sessions
from dev.harness.parts.signals import open_signals
from dev.harness.parts.soak import open_soak
from dev.harness.parts.templates import open_template
from dev.harness.parts.tiers import open_tiers
from dev.harness.parts.tokenizers import open_tokenizer
from dev.harness.parts.traces import open_trace

PARTS = {
    part.name: part
    for part in (
        Part("headers", open_headers),
        Part("gguf", open_gguf),
        Part("index", open_index),
        Part("configs", open_configs),
        Part("tokenizer", open_tokenizer),
        Part("template", open_template),
        Part("trace", open_trace),
        Part("sessions", open_sessions),
        Part("journal", open_journal),
        Part("kills", open_kills),
        Part("options", open_options),
        Part("io", open_io),
        Part("allocation", open_allocation),
        Part("threads", open_threads),
        Part("signals", open_signals, patience=180),
        Part("interrupts", open_interrupts, patience=30),
        Part("soak", open_soak),
        Part("tiers", open_tiers),
        Part("ranks", open_ranks, patience=180),
        Part("server", open_server, cpu_seconds=60, patience=180),
    )
}
