"""One slow float64 reference a method, written from its equation: ``reference(student, teacher, options) -> {term: value}``."""
