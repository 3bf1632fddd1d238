(function_declaration name: (_) @name body: (_) @body) @function
(method_declaration
    receiver: (parameter_list (parameter_declaration type: (_) @receiver)) name: (_) @name body: (_) @body
) @function
(type_declaration (type_spec name: (_) @name)) @type
(comment) @comment
(raw_string_literal) @verbatim
