(function_declaration name: (_) @name body: (_) @body) @function
(init_declaration "init" @name body: (_) @body) @function
(protocol_function_declaration name: (_) @name) @type
(class_declaration name: (type_identifier) @name) @scope
(class_declaration name: (user_type) @name) @extension
(protocol_declaration name: (_) @name) @scope
(typealias_declaration name: (type_identifier) @name) @type
[(comment) (multiline_comment)] @comment
