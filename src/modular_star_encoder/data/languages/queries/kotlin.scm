(function_declaration (simple_identifier) @name (function_body) @body) @function
(function_declaration (simple_identifier) @name .) @type
[(class_declaration (type_identifier) @name) (object_declaration (type_identifier) @name)] @scope
(type_alias (type_identifier) @name) @type
[(line_comment) (multiline_comment)] @comment
