"""An explanation: what ran where, with which options, and the sections that say what became of the caches."""

from dataclasses import dataclass

from tqcompile.explain.section import Section
from tqcompile.explain.sizes import totals
from tqcompile.explain.tables import cache_record


@dataclass(frozen=True)
class Explanation:
    """`head` names what ran and on what, `context` tokens and `batch` sequences are what totals are of."""

    head: dict[str, str]
    sections: tuple[Section, ...]
    context: int
    batch: int

    @property
    def trouble(self) -> bool:
        """Whether a run stopped early, or nothing was compiled."""
        return any(section.trouble for section in self.sections)

    def record(self) -> dict:
        """All of it but the graphs and kernels, as JSON holds it."""
        return {
            **self.head,
            "context": self.context,
            "batch": self.batch,
            "sections": [self._section(section) for section in self.sections],
        }

    def _section(self, section: Section) -> dict:
        return {
            "title": section.title,
            "trouble": section.trouble,
            "totals": [vars(total) for total in totals(section, self.context, self.batch)],
            "graphs": [
                {
                    "graph": graph.name,
                    "compiled_by": section.calls.get(graph.name, ""),
                    "reads_of_codes": graph.reads,
                    "caches": [cache_record(facts, section.layers) for facts in graph.facts],
                    "kernels": list(graph.texts.kernels) if graph.texts else [],
                }
                for graph in section.graphs
            ],
        }
