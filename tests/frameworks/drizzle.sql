-- Drizzle ORM 0.45.4 with Drizzle Kit 0.31.11
-- Run: drizzle-kit generate --dialect postgresql --schema ./schema.ts
-- schema.ts, without its imports:
--
--   export const resultKind = pgEnum("result_kind", ["success", "failure", "timeout"]);
--
--   export const auditLog = pgTable("audit_log", {
--     id: integer().primaryKey().generatedAlwaysAsIdentity(),
--     actor: varchar({ length: 255 }).notNull(),
--     action: varchar({ length: 255 }).notNull(),
--     startedAt: timestamp("started_at").defaultNow().notNull(),
--     completedAt: timestamp("completed_at"),
--     resultKind: resultKind("result_kind"),
--   }, (table) => [index("audit_log_started_at_idx").on(table.startedAt)]);

CREATE TYPE "public"."result_kind" AS ENUM('success', 'failure', 'timeout');--> statement-breakpoint
CREATE TABLE "audit_log" (
	"id" integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "audit_log_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 2147483647 START WITH 1 CACHE 1),
	"actor" varchar(255) NOT NULL,
	"action" varchar(255) NOT NULL,
	"started_at" timestamp DEFAULT now() NOT NULL,
	"completed_at" timestamp,
	"result_kind" "result_kind"
);
--> statement-breakpoint
CREATE INDEX "audit_log_started_at_idx" ON "audit_log" USING btree ("started_at");
