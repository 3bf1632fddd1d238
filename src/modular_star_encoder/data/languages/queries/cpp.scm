(function_definition declarator: (_) @declarator body: (_) @body) @function
(template_declaration (function_definition declarator: (_) @declarator body: (_) @body)) @function
(template_declaration (template_declaration
    (function_definition declarator: (_) @declarator body: (_) @body))) @function
; Without a type, a plain name is a constructor if the class around it has the same name, and a macro otherwise.
(function_definition
    !type declarator: (function_declarator declarator: [(identifier) (field_identifier)]) body: (_) @untyped)
[(class_specifier name: (_) @name body: (_)) (struct_specifier name: (_) @name body: (_))
 (union_specifier name: (_) @name body: (_))] @scope
; A word between `class` and the name, as in `class EXPORT Name {…}`, makes the class look like a function.
(function_definition type: [(class_specifier) (struct_specifier)] declarator: (identifier) @name) @scope
[(enum_specifier name: (_) @name body: (_)) (alias_declaration name: (_) @name)
 (concept_definition name: (_) @name)] @type
(comment) @comment
[(raw_string_literal) (string_literal)] @verbatim
