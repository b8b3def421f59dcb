// One request as JSON per line of stdin: its secret, its headers, and its body in base64. One line of stdout for each:
// whether the library takes it.
import { createInterface } from "node:readline";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

function verifies({ secret, headers, body }) {
  try {
    new Webhook(secret).verify(Buffer.from(body, "base64"), headers);
    return true;
  } catch (error) {
    if (error instanceof WebhookVerificationError) return false;
    throw error;
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(verifies(JSON.parse(line)));
}
