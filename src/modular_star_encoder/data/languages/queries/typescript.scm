; also for TSX
[(function_declaration name: (_) @name body: (_) @body)
 (generator_function_declaration name: (_) @name body: (_) @body)
 (method_definition name: (_) @name body: (_) @body)] @function
[(variable_declarator
    name: (identifier) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
 (lexical_declaration . (variable_declarator
    name: (identifier) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)]) .)
 (variable_declaration . (variable_declarator
    name: (identifier) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)]) .)
 (assignment_expression
    left: [(identifier) (member_expression)] @name
    right: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
 (public_field_definition
    name: (_) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
 (pair
    key: (_) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
] @function
(function_signature name: (_) @name) @type
(program [(lexical_declaration (variable_declarator name: (identifier) @name) @type)
          (export_statement (lexical_declaration (variable_declarator name: (identifier) @name) @type))])
[(type_alias_declaration name: (_) @name) (enum_declaration name: (_) @name)] @type
[(class_declaration name: (_) @name) (abstract_class_declaration name: (_) @name)
 (interface_declaration name: (_) @name) (internal_module name: (_) @name)] @scope
(comment) @comment
[(template_string) (string)] @verbatim
