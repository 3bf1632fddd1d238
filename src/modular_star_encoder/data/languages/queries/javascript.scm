[(function_declaration name: (_) @name body: (_) @body)
 (generator_function_declaration name: (_) @name body: (_) @body)
 (function_expression name: (_) @name body: (_) @body)
 (generator_function name: (_) @name body: (_) @body)
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
 (expression_statement (assignment_expression
    left: [(identifier) (member_expression)] @name
    right: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)]))
 (pair
    key: (_) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
 (field_definition
    property: (_) @name
    value: [(function_expression body: (_) @body) (generator_function body: (_) @body) (arrow_function body: (_) @body)])
] @function
(export_statement "default" @name value: [
    (function_expression !name body: (_) @body)
    (generator_function !name body: (_) @body)
    (arrow_function body: (_) @body)
] @function)
(class_declaration name: (_) @name) @scope
(variable_declarator name: (identifier) @name value: [(object) (class)]) @scope
(assignment_expression left: [(identifier) (member_expression)] @name right: [(object) (class)]) @scope
(pair key: (_) @name value: (object)) @scope
(comment) @comment
[(template_string) (string)] @verbatim
