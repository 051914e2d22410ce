-- TypeORM 1.1.1 with pg 8.23.1
-- Run: await dataSource.driver.createSchemaBuilder().log()
-- The entity; the command is what `typeorm schema:log` calls:
--
--   export enum ResultKind { Success = "success", Failure = "failure", Timeout = "timeout" }
--
--   @Entity()
--   export class AuditLog {
--     @PrimaryGeneratedColumn() id: number;
--     @Column() actor: string;
--     @Column() action: string;
--     @Index() @Column() startedAt: Date;
--     @Column({ nullable: true }) completedAt: Date;
--     @Column({ type: "enum", enum: ResultKind, nullable: true }) resultKind: ResultKind;
--     @CreateDateColumn() createdAt: Date;
--     @UpdateDateColumn() updatedAt: Date;
--   }

CREATE TYPE "public"."audit_log_resultkind_enum" AS ENUM('success', 'failure', 'timeout');
CREATE TABLE "audit_log" ("id" SERIAL NOT NULL, "actor" character varying NOT NULL, "action" character varying NOT NULL, "startedAt" TIMESTAMP NOT NULL, "completedAt" TIMESTAMP, "resultKind" "public"."audit_log_resultkind_enum", "createdAt" TIMESTAMP NOT NULL DEFAULT now(), "updatedAt" TIMESTAMP NOT NULL DEFAULT now(), CONSTRAINT "PK_07fefa57f7f5ab8fc3f52b3ed0b" PRIMARY KEY ("id"));
CREATE INDEX "IDX_1a658e4c76a4955b243c672e92" ON "audit_log"  ("startedAt") ;
