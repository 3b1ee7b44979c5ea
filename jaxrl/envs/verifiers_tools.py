"""Tools of `verifiers` tasks, called in this process: none of their servers is started.

Of verifiers' own the MCP server of a Toolset is used, and the two methods by which it would ask
another process for the rollout's state (tests/envs/test_verifiers_tasks.py holds them to it).
"""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from jaxrl.options import ConfigError


class Tools:
    """The tools of one rollout. schemas: as chat templates take them, by name."""

    def __init__(self, servers: Mapping[str, tuple[Any, str]], schemas: Mapping[str, Any]):
        self._servers, self.schemas = servers, schemas

    async def call(self, call: Mapping[str, str]) -> str:
        """What it returns, as text; of what it raises the message, as verifiers tells it."""
        server, name = self._servers[call["name"]]
        try:
            result = await server.call_tool(name, json.loads(call["arguments"]))
        except Exception as error:  # of any kind: the tools are not ours
            return str(error)
        return "\n".join(getattr(block, "text", str(block)) for block in result.content)


@contextlib.asynccontextmanager
async def opened(task: Any, taskset: Any, state: Any) -> AsyncIterator[Tools]:
    """The tools of this task and of its taskset, which share `state`. Raises ConfigError for names
    that occur twice."""
    from mcp.server.mcpserver import MCPServer

    servers, schemas = {}, {}
    async with contextlib.AsyncExitStack() as stack:
        own = task.toolsets(task.config)
        for toolset in [*own, *taskset.toolsets(taskset.config)]:
            await stack.enter_async_context(toolset._exit_stack)
            _share(toolset, state)
            await toolset.setup()
            if toolset in own:
                await toolset.setup_task(task.data)
            server = MCPServer(toolset.server_name or type(toolset).__name__)
            toolset.register(server)
            for tool in await server.list_tools():
                prefix = f"{toolset.server_name}_" if toolset.server_name else ""
                name = prefix + tool.name
                if name in servers:
                    raise ConfigError(f"two tools are called {name!r}")
                servers[name] = (server, tool.name)
                schemas[name] = {
                    "type": "function",
                    "function": {
                        "name": name,
                        "description": tool.description or "",
                        "parameters": tool.input_schema,
                    },
                }
        yield Tools(servers, schemas)


def _share(toolset: Any, state: Any) -> None:
    """Let what the tools keep be `state`, instead of what another process holds."""

    async def pull() -> Any:
        return state

    async def push(before: bytes) -> None:
        del before

    toolset._pull_state, toolset._push_state = pull, push
