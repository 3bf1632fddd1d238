(function_definition name: (_) @name body: (_) @body) @function
(comment) @comment
[(string) (raw_string) (heredoc_body)] @verbatim
