"""Many explanations, one statement: what drives each class, errors by concept, suspected shortcuts, comparisons."""

from captum_concepts.audit.comparison import AuditComparison, compare_audits
from captum_concepts.audit.concept_audit import ConceptAudit, audit_dataset
from captum_concepts.audit.statistics import Effect, Suspect

__all__ = ["AuditComparison", "ConceptAudit", "Effect", "Suspect", "audit_dataset", "compare_audits"]
