"""Audits of a data set: what drives each class, concepts of errors, suspected shortcuts and comparisons of audits."""

from captum_concepts.audit.comparison import AuditComparison, compare_audits
from captum_concepts.audit.concept_audit import ConceptAudit, audit_dataset
from captum_concepts.audit.statistics import Effect, Suspect

__all__ = ["AuditComparison", "ConceptAudit", "Effect", "Suspect", "audit_dataset", "compare_audits"]
